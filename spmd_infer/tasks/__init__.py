"""What engines are used for: embed, classify, generate; each turns people's data into tensors and results back."""
