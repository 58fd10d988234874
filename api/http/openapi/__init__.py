"""The OpenAPI description of every route: a table for each room of routes; ``document`` puts them together."""
