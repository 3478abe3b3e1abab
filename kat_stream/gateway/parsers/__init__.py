"""How families of models write tool calls and reasoning, one a file. Pure: text in, calls out."""
