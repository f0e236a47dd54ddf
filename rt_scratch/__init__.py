"""rt_scratch"""
