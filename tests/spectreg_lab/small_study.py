"""A study of runs of a second, and a search over its settings."""

STUDY = """
name = "small"
epochs = 2
seeds = [0, 1]
[regimes.small]
batch_size = 16
[regimes.large]
batch_size = 64
[settings.vgg]
model = { name = "vgg", width = 4, stages = [1, 1], hidden = 8 }
data = { name = "digits", train_size = 96, test_size = 40 }
learning_rate = { small = 0.05, large = 0.1 }
[methods.vanilla]
[methods.decay]
[methods.strong-decay]
name = "decay"
strength = 0.1
"""
SEARCH = """
[search.learning_rate]
small = [0.1, 0.2]
large = [0.3]
[search.strength]
decay = [1e-3, 1e-2, 1e-1]
"""
