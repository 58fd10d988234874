// The settings of the page: https://swagger.io/docs/open-source-tools/swagger-ui/usage/configuration/
window.ui = SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  filter: true,
  tryItOutEnabled: true,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
  validatorUrl: null, // a badge that would send the description to somebody else
});
