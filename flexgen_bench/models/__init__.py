"""Model families: shapes, weight names and the formulas of a layer. Know nothing about tiers, and no torch."""
