"""What an exhibit is made of: cells, lines, panels and their labels."""
