"""Which parameters count as weights, and the linear map of each."""
