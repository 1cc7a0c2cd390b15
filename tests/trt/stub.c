/* The symbols that TensorRT's Python bindings import, doing nothing: with it the real bindings load
 * on a machine without TensorRT, and their classes, signatures and plain data types can be used. */
void *createInferBuilder_INTERNAL(void *logger, int version) { (void)logger, (void)version; return 0; }
void *createInferRefitter_INTERNAL(void *engine, void *logger, int version) { (void)engine, (void)logger, (void)version; return 0; }
void *createInferRuntime_INTERNAL(void *logger, int version) { (void)logger, (void)version; return 0; }
void *getBuilderPluginRegistry(int capability) { (void)capability; return 0; }
void *getPluginRegistry(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { (void)refitter, (void)logger, (void)version; return 0; }
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { (void)network, (void)logger, (void)version; return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void *logger, const char *name) { (void)logger, (void)name; return 1; }
