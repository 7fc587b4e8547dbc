"""What any program needs: files, signals, exit codes, seeds, schemas, processes that agree."""
