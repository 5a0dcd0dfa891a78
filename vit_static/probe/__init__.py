"""Quality of frozen features: k-NN, logistic regression and few-shot classification."""
