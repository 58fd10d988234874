"""The RunPod serverless worker: the platform's own SDK over the same service and engine."""
