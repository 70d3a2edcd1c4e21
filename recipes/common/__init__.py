"""What the recipes share. Nothing in here is launched."""
