"""The evolutionary search for layer-wise rates: proposers ask, the loop projects, scores and journals, and tells."""
