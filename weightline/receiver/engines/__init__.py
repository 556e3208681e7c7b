"""Inference engines behind one small protocol, `weightline.receiver.engines.base.Engine`."""
