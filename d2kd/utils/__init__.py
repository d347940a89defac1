"""What every other package may use: errors, files, processes, versions. It uses none of them."""
