"""What the command line asks and shows: how a recipe or a workspace is opened, options, tables, reports, the SQL prompt, chat."""
