"""Inference engines behind one small protocol, `weightline.serving.engines.base.Engine`."""
