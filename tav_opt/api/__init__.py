"""OpenAI's videos API over HTTP, in front of a running server: jobs that outlive both."""
