"""The PyTorch dialect: capture through torch.export, read, edit, and give the class back."""
