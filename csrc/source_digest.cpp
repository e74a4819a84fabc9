// The digest is in a file of its own: if any source changes, only this file is recompiled for the
// new digest.
namespace pylora {

const char* source_digest() { return PYLORA_SOURCE_DIGEST; }

}  // namespace pylora
