"""The LLM proxy: every model call of an agent goes through here and becomes a turn on the log."""
