"""The input and output of the command line: opening a recipe or workspace, options, tables, reports, the SQL prompt, chat."""
