"""RMSNorm with quantisation, and the QKV product with QK-norm and rotation."""
