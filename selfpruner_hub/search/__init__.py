"""The search for layer-wise rates: the loop asks a proposer, projects, scores and journals its plans, and tells it."""
