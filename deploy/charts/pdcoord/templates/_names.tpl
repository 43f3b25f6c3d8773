{{/* Names that Kubernetes refuses or that two objects would have. Each renders nothing. */}}

{{/* The full name is a Service's, so it begins with a letter and has no dot (a label of RFC 1035). */}}
{{- define "pdcoord.validateFullname" -}}
{{- $v := .Values -}}
{{- $label := "lower-case letters, digits and dashes" -}}
{{- if and $v.nameOverride (not (regexMatch "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$" $v.nameOverride)) -}}
  {{- fail (printf "nameOverride is %q, which no label and no object may be called: give %s, at both ends no dash" $v.nameOverride $label) -}}
{{- end -}}
{{- $name := include "pdcoord.fullname" . -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" $name) -}}
  {{- if $v.fullnameOverride -}}
    {{- fail (printf "fullnameOverride is %q, which no Service may be called: give %s that begin with a letter" $v.fullnameOverride $label) -}}
  {{- end -}}
  {{- fail (printf "fullnameOverride is empty and the release is called %q, which makes the name %q, which no Service may have: set fullnameOverride to %s that begin with a letter" .Release.Name $name $label) -}}
{{- end -}}
{{- end -}}

{{/* What follows the full name in names of objects that the chart makes in some mode. */}}
{{- define "pdcoord.namesReserved" -}}
{{- list "control" "coordinator" "dashboards" "engines" "envoy" "epp" "keys" "patches" "policy" "sidecars" | toJson -}}
{{- end -}}

{{/* {"pool", "at"}: objects of pools are called by the full name and the pool's. */}}
{{- define "pdcoord.validatePoolName" -}}
{{- $reserved := include "pdcoord.namesReserved" . | fromJsonArray -}}
{{- if or (has .pool.name $reserved) (hasSuffix "-sidecars" .pool.name) -}}
  {{- fail (printf "%s.name is %q, which objects of this chart are called by: give another name than %s, and none that ends in -sidecars" .at .pool.name (join ", " $reserved)) -}}
{{- end -}}
{{- end -}}

{{/* Adopted pools: an endpoint belongs to one pool, and a Deployment gets one patch. */}}
{{- define "pdcoord.validateSelectors" -}}
{{- $before := list -}}
{{- range $m, $model := .Values.models -}}
  {{- range $p, $pool := $model.pools -}}
    {{- if hasKey $pool "existing" -}}
      {{- $at := printf "models[%d].pools[%d].existing" $m $p -}}
      {{- $here := $pool.existing -}}
      {{- range $other := $before -}}
        {{- $shared := 0 -}}
        {{- range $key, $value := $here.matchLabels -}}
          {{- if and (hasKey $other.existing.matchLabels $key) (eq (index $other.existing.matchLabels $key) $value) -}}{{- $shared = add1 $shared -}}{{- end -}}
        {{- end -}}
        {{- $least := min (len $here.matchLabels) (len $other.existing.matchLabels) -}}
        {{- if eq (int $shared) (int $least) -}}
          {{- fail (printf "%s.matchLabels is %s, and %s.matchLabels is %s: one selects all that the other does, and a server belongs to one pool; give labels that tell them apart" $at (toJson $here.matchLabels) $other.at (toJson $other.existing.matchLabels)) -}}
        {{- end -}}
        {{- if and $here.deployment (eq (default "" $other.existing.deployment) $here.deployment) -}}
          {{- fail (printf "%s.deployment is %q, which %s.deployment is too: a Deployment is of one pool and gets one patch; name each pool's own" $at $here.deployment $other.at) -}}
        {{- end -}}
      {{- end -}}
      {{- $before = append $before (dict "at" $at "existing" $here) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end -}}
