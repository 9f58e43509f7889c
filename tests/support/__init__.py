"""What several test files share: small models, recipes, workspaces, processes."""
