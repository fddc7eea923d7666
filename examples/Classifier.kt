// Runs a kdistill .tflite on Android. Labels, type and scale are read from the file itself.
// Gradle: implementation("com.google.ai.edge.litert:litert:1.4.0")
package com.example.kdistill

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.zip.ZipFile
import kotlin.math.roundToInt
import org.tensorflow.lite.DataType
import org.tensorflow.lite.Interpreter
import org.tensorflow.lite.Tensor

/** `file`: copied from the assets to the app's files, so that it can be opened as an archive. */
class Classifier(file: File, threads: Int = 2) : AutoCloseable {
    // The metadata's archive is appended to the model.
    val labels: List<String> = ZipFile(file).use { archive ->
        archive.getInputStream(archive.getEntry("labels.txt")).bufferedReader().readLines()
    }
    private val interpreter = Interpreter(file, Interpreter.Options().setNumThreads(threads))
    private val input: Tensor = interpreter.getInputTensorFromSignature("image", "serving_default")
    private val outputName =
        interpreter.getSignatureOutputs("serving_default").first { it == "probabilities" || it == "logits" }
    private val output: Tensor = interpreter.getOutputTensorFromSignature(outputName, "serving_default")

    /** `pixels`: 0..255, row by row, the channels of a pixel together. One score for each label. */
    fun scores(pixels: IntArray): FloatArray {
        val image = ByteBuffer.allocateDirect(input.numBytes()).order(ByteOrder.nativeOrder())
        for (pixel in pixels) {
            when (input.dataType()) {
                DataType.FLOAT32 -> image.putFloat(pixel.toFloat())
                else -> image.put(quantized(pixel).toByte())
            }
        }
        image.rewind()
        val made = ByteBuffer.allocateDirect(output.numBytes()).order(ByteOrder.nativeOrder())
        interpreter.runSignature(mapOf("image" to image), mapOf(outputName to made), "serving_default")
        made.rewind()
        val scale = output.quantizationParams()
        return FloatArray(labels.size) {
            when (output.dataType()) {
                DataType.FLOAT32 -> made.getFloat()
                DataType.UINT8 -> ((made.get().toInt() and 0xff) - scale.zeroPoint) * scale.scale
                else -> (made.get().toInt() - scale.zeroPoint) * scale.scale
            }
        }
    }

    /** The pixel as the file takes it. A uint8 input without a scale takes the pixel itself. */
    private fun quantized(pixel: Int): Int {
        val scale = input.quantizationParams()
        if (scale.scale == 0f) return pixel
        val range = if (input.dataType() == DataType.UINT8) 0..255 else -128..127
        return ((pixel / scale.scale).roundToInt() + scale.zeroPoint).coerceIn(range)
    }

    override fun close() = interpreter.close()
}
