"""The program around the method: configurations, plans, runs, commands. Read it from `cli` and `running`."""
