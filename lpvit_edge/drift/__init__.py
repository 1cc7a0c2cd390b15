"""Watch whether the line still shows the model what it was made for."""
