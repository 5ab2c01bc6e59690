"""What the paper compares with: adversarial training and the Jacobian penalties."""
