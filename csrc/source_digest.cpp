// A file of its own, so that a change in any source recompiles this one alone for the new digest.
namespace pylora {

const char* source_digest() { return PYLORA_SOURCE_DIGEST; }

}  // namespace pylora
