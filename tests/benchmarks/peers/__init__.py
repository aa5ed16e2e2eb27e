"""`make bench ARGS=--peers`: Latchkey beside what people would use instead, in one run.

`measure.py` runs the rounds and prints the table. `servers.py` contains one function for each
product: it starts the product as its documentation describes, on the same Postgres, and creates and
deletes credentials. `starting.py` contains what these functions share, and `programs.py` builds the
products. `introspection.py` sends the load to a product that has no gRPC.
"""
