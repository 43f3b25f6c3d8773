{{/*
All pools of all models, resolved: a JSON object {"models": [...]}, each model with its `pools`, each pool with
what its vendor gives and it does not say itself. Everything else in this chart reads pools from here.
*/}}
{{- define "pdcoord.resolved" -}}
{{- include "pdcoord.validate" . -}}
{{- $root := . -}}
{{- $models := list -}}
{{- range $m, $model := .Values.models -}}
  {{- $slug := include "pdcoord.slug" $model -}}
  {{- $pools := list -}}
  {{- range $p, $pool := $model.pools -}}
    {{- $path := printf "models[%d].pools[%d]" $m $p -}}
    {{- $pools = append $pools (include "pdcoord.resolvePool" (dict "root" $root "model" $model "pool" $pool "path" $path) | fromJson) -}}
  {{- end -}}
  {{- $models = append $models (merge (dict "slug" $slug "pools" $pools "index" $m) (omit $model "pools")) -}}
{{- end -}}
{{- dict "models" $models | toJson -}}
{{- end -}}

{{/* A model's name as part of an object's name. */}}
{{- define "pdcoord.slug" -}}
{{- default (.name | lower | regexFind "[^/]+$" | replace "." "-" | replace "_" "-" | trunc 40 | trimAll "-") .id -}}
{{- end -}}

{{- define "pdcoord.resolvePool" -}}
{{- $root := .root -}}{{- $model := .model -}}{{- $pool := .pool -}}
{{- $vendor := index $root.Values.vendors $pool.vendor -}}
{{- $isPd := $root.Values.pd.enabled -}}
{{- $engine := default "vllm" $pool.engine -}}
{{- $role := ternary $pool.role "both" $isPd -}}
{{- $connector := "none" -}}
{{- if $isPd -}}
  {{- $connector = default (ternary (ternary "sglang" "none" (ne $role "both")) $root.Values.pd.connector (eq $engine "sglang")) $pool.connector -}}
{{- end -}}
{{- $size := int (default 1 $pool.size) -}}
{{- $accelerators := int (default 1 $pool.accelerators) -}}
{{- $ranks := mul $size $accelerators -}}
{{- $tensor := int (default $ranks $pool.tensorParallel) -}}
{{- $given := default dict $pool.layout -}}
{{- $layout := deepCopy $given -}}
{{- if and (not (hasKey $given "preset")) (not (hasKey $given "block_tokens")) -}}
  {{- $layout = merge $layout (deepCopy $vendor.layout) -}}
{{- end -}}
{{- if and (not (hasKey $layout "block_tokens")) (not (hasKey $given "preset")) -}}
  {{- $_ := set $layout "block_tokens" (int $vendor.blockTokens) -}}
{{- end -}}
{{- if gt $tensor 1 -}}{{- $_ := set $layout "tensor_parallel" $tensor -}}{{- end -}}
{{- if and (eq $connector "nixl") (not (hasKey $given "order")) (not (hasKey $given "preset")) -}}
  {{- $_ := set $layout "order" $vendor.nixlOrder -}}
{{- end -}}
{{- $scale := divf (float64 (default 8 $model.billionParameters)) 8.0 | mulf (divf 1.0 (float64 $tensor)) -}}
{{- $speed := dict -}}
{{- range $key, $value := $vendor.speed -}}
  {{- $scales := has $key (list "prefill_ms_per_token" "step_base_ms") -}}
  {{- $_ := set $speed $key (ternary (round (mulf (float64 $value) $scale) 4) (float64 $value) $scales) -}}
{{- end -}}
{{- $_ := set $speed "step_ns_per_context_token" (round (divf (float64 $model.kvBytesPerToken) (mulf (float64 $vendor.memoryTBPerSecond) 1000.0 (float64 $tensor))) 4) -}}
{{- $speed = merge (deepCopy (default dict $pool.speed)) $speed -}}
{{- if and (eq $engine "sglang") (eq $role "decode") -}}
  {{- $speed = omit $speed "prefill_base_ms" "prefill_ms_per_token" "prefill_ns_per_token_squared" -}}
{{- end -}}
{{- $image := merge (deepCopy (default dict $pool.image)) (deepCopy $vendor.image) -}}
{{- if and (eq $engine "sglang") (not (dig "repository" "" (default dict $pool.image))) -}}
  {{- $image = merge (dict "repository" "lmsysorg/sglang" "tag" "v0.5.23") $image -}}
{{- end -}}
{{- /* Those that decode tell coordinators and hand over; with TLS between parts all pods have one, which ends it. */ -}}
{{- $hasControl := and $isPd (ne $role "prefill") -}}
{{- $hasSidecar := or $hasControl (ne $root.Values.auth.internalTls.secretName "") -}}
{{- $isAdopted := hasKey $pool "existing" -}}
{{- $existing := default dict $pool.existing -}}
{{- $enginePort := ternary 8200 8000 $hasSidecar -}}
{{- $sidecarPort := 8000 -}}
{{- if $isAdopted -}}
  {{- $enginePort = int (default 8000 $existing.port) -}}
  {{- $sidecarPort = int (default 8001 $existing.sidecarPort) -}}
{{- end -}}
{{- /* Where a patch has something to say: a sidecar, a port that is not the default, a label for the Gateway. */ -}}
{{- $isEntry := and (ne $role "prefill") (eq $root.Values.gateway.mode "attach") -}}
{{- $isPatched := and $root.Values.adopt.patches $existing.deployment (or $hasSidecar $isEntry (ne $enginePort 8000)) | not | not -}}
{{- /* A pod's end: calls end and KV is fetched, the engine stops (10 s), then a native sidecar is told, drains, and
closes (5 s). Where the time that is given is too short for all, the sidecar's part gives way, down to 4 s. */ -}}
{{- $wait := max (int $root.Values.pd.leaseSeconds) (int $root.Values.sidecar.drainSeconds) -}}
{{- $drain := int (ternary $root.Values.sidecar.drainSeconds 0 $hasSidecar) -}}
{{- $stop := ternary 15 10 $hasSidecar -}}
{{- $grace := int (default (add $wait 15 $drain) $pool.terminationGracePeriodSeconds) -}}
{{- $drain = min $drain (max 4 (sub (sub $grace $wait) $stop)) -}}
{{- $sleep := max 1 (sub (sub $grace $stop) $drain) -}}
{{- dict
    "path" .path
    "name" $pool.name
    "objectName" (printf "%s-%s" (include "pdcoord.fullname" $root) $pool.name)
    "role" $role
    "vendorName" $pool.vendor
    "vendor" $vendor
    "engine" $engine
    "connector" $connector
    "replicas" (int (ternary $pool.replicas 1 (hasKey $pool "replicas")))
    "size" $size
    "accelerators" $accelerators
    "tensorParallel" $tensor
    "layout" $layout
    "blockTokens" (int (default $vendor.blockTokens $layout.block_tokens))
    "speed" $speed
    "image" $image
    "hasSidecar" $hasSidecar
    "hasControl" $hasControl
    "isAdopted" $isAdopted
    "isPatched" $isPatched
    "enginePort" $enginePort
    "sidecarPort" $sidecarPort
    "grace" $grace
    "sleep" $sleep
    "sidecarDrain" $drain
    "model" $model
    "pool" $pool
  | toJson -}}
{{- end -}}

{{/* Labels that select one pool's pods. */}}
{{- define "pdcoord.poolSelector" -}}
{{ include "pdcoord.selectorLabels" .root }}
app.kubernetes.io/component: engine
pdcoord.io/pool: {{ .pool.name | quote }}
{{- end -}}

{{/* The policy document of one model, as the file and the custom resource have it. */}}
{{- define "pdcoord.policyDocument" -}}
{{- $root := .root -}}{{- $model := .model -}}
{{- $given := default dict $model.policy -}}
{{- $head := dict "name" $model.name -}}
{{- with $model.aliases -}}{{- $_ := set $head "aliases" . -}}{{- end -}}
{{- with $model.adapters -}}{{- $_ := set $head "adapters" . -}}{{- end -}}
{{- $head = merge $head (omit (default dict $given.model) "name" "aliases" "adapters") -}}
{{- $pools := list -}}
{{- range $pool := $model.pools -}}
  {{- $selector := dict "pdcoord.io/pool" $pool.name -}}
  {{- if $pool.isAdopted -}}{{- $selector = $pool.pool.existing.matchLabels -}}{{- end -}}
  {{- $entry := dict
      "name" $pool.name
      "role" $pool.role
      "vendor" $pool.vendorName
      "engine" $pool.engine
      "connector" $pool.connector
      "kv_bytes_per_token" (int64 $model.kvBytesPerToken)
      "selector" (dict "match_labels" $selector)
      "speed" $pool.speed -}}
  {{- if ne $pool.connector "none" -}}{{- $_ := set $entry "layout" $pool.layout -}}{{- end -}}
  {{- with $pool.pool.linkGbitPerSecond -}}{{- $_ := set $entry "link_gbit_per_s" . -}}{{- end -}}
  {{- with $pool.pool.costPerHour -}}{{- $_ := set $entry "cost_per_hour" . -}}{{- end -}}
  {{- with $pool.pool.limits -}}{{- $_ := set $entry "limits" . -}}{{- end -}}
  {{- if hasKey $pool.pool "priorityMax" -}}{{- $_ := set $entry "priority_max" $pool.pool.priorityMax -}}{{- end -}}
  {{- $pools = append $pools $entry -}}
{{- end -}}
{{- $disaggregation := deepCopy (default dict $given.disaggregation) -}}
{{- if $root.Values.pd.enabled -}}
  {{- $lease := mul (int $root.Values.pd.leaseSeconds) 1000 -}}
  {{- $disaggregation = merge $disaggregation (dict "lease_ms" $lease "transfer_deadline_ms" (div (mul $lease 2) 3)) -}}
{{- else -}}
  {{- $disaggregation = dict "mode" "never" -}}
{{- end -}}
{{- $document := dict "apiVersion" "pdcoord.io/v1alpha1" "kind" "PoolPolicy" "metadata" (dict "name" $model.slug) "model" $head "pools" $pools "disaggregation" $disaggregation -}}
{{- range $key := list "fallback" "slo" "admission" -}}
  {{- with index $given $key -}}{{- $_ := set $document $key . -}}{{- end -}}
{{- end -}}
{{- $document | toYaml -}}
{{- end -}}

{{/* Label selector of the pods that the coordinator looks at. */}}
{{- define "pdcoord.podSelector" -}}
{{- if .Values.adopt.enabled -}}
  {{- if .Values.adopt.podSelector -}}
    {{- .Values.adopt.podSelector -}}
  {{- else -}}
    {{- $key := "" -}}{{- $values := list -}}
    {{- range .Values.models -}}{{- range .pools -}}
      {{- range $k, $value := .existing.matchLabels -}}{{- $key = $k -}}{{- $values = append $values $value -}}{{- end -}}
    {{- end -}}{{- end -}}
    {{- printf "%s in (%s)" $key ($values | uniq | sortAlpha | join ",") -}}
  {{- end -}}
{{- else -}}
  {{- printf "llm-d.ai/inference-serving=true,app.kubernetes.io/instance=%s" .Release.Name -}}
{{- end -}}
{{- end -}}

{{/* "true" where some server has a sidecar. */}}
{{- define "pdcoord.hasSidecars" -}}
{{- if or .Values.pd.enabled .Values.auth.internalTls.secretName -}}true{{- end -}}
{{- end -}}

{{/* "true" where this chart creates servers itself. */}}
{{- define "pdcoord.hasOwnPools" -}}
{{- range .Values.models -}}{{- range .pools -}}{{- if not (hasKey . "existing") -}}true{{- end -}}{{- end -}}{{- end -}}
{{- end -}}
