"""Recovery: distil a pruned model from its dense parent, from text that the parent writes."""
