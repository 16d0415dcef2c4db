"""What runs left in their folders, read without torch: model cards and report pages."""
