"""Importers that convert config files of other tools to params.yaml."""
