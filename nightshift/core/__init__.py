"""What every program needs: parameters, errors, files, paths, keys of what is kept."""
