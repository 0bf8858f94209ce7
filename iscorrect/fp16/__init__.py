"""The FP16 switch: may this model train and sample in FP16."""
