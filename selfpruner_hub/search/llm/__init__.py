"""A language model as proposer: prompts, reply schema, local model and endpoint."""
