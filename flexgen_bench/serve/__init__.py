"""An HTTP server in OpenAI's form over one open job."""
