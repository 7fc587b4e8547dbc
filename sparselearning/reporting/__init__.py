"""Runs read back from their files: grouped, tabulated, drawn, their tickets analysed."""
