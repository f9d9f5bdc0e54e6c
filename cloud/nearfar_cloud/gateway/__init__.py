"""HTTP in front of the engine: OpenAI routes, keys and limits, metrics.  asyncio lives here and nowhere below."""
