"""Latchkey's page for people: they create, see, review and delete the API tokens of their account.

It owns what a browser sees: pages, forms, who is looking, and the one display of a new secret. It
does not own tokens: it is a thin client of TokenService through the client library `latchkey`, and
keeps nothing but what the next request of the same browser needs. That is kept in memory, so one
process serves a page: several would not know of each other's forms.
"""
