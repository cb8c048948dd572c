"""Plans: how much each layer keeps, the budget, the loss that is predicted, the plans a search starts from."""
