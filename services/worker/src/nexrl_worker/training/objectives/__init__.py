"""What an update minimises: a model's scores of a micro-batch, a loss of losses/, and the metrics of both."""
