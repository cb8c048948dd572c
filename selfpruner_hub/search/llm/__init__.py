"""A language model as proposer: what it is asked, what it may answer, and who answers."""
