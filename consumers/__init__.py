"""Services that are driven by a topic, also when they emit. One file is one service."""
