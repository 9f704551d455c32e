"""Pictures made from records alone: points first, drawing apart (docs/notes/pictures.md)."""
