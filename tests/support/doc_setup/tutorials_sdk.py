"""The provider's model has its price, for the address is not the provider's own."""

from doc_setup import how_to_any_code as how_to_any_code
