"""Surgery: small modules that bring a merged model's representations near to one expert's."""
