"""The command line `rlhf`: LightningCLI over the stages, data preparation, and the quickstart."""
