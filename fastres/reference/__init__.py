"""The networks in plain eager PyTorch, a file each: what every faster form is checked against."""
