"""Plans: widths of every layer, the budget β, predicted losses, and the seed plans of a search."""
