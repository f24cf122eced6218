"""The methods that a recipe can name, one file each."""
